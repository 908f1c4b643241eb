"""`python -m peft_poly` is `peft-poly`."""

from .cli import main

if __name__ == "__main__":
    main()
