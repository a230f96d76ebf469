"""From records as they come (LLaVA JSON, messages, Parquet …) to batches a vision-language model trains on."""
