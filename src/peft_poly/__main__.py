"""`python -m peft_poly` is `peft-poly`."""

from .cli.commands import main

if __name__ == "__main__":
    main()
