"""What a data set consists of, before a GPU is rented: `python -m data.inspect`."""
