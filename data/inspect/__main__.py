from data.commands.inspect import main

if __name__ == "__main__":  # workers that are spawned import this file
    raise SystemExit(main())
