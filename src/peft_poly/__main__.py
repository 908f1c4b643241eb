"""`python -m peft_poly` is `peft-poly`."""

from peft_poly_cli import main

if __name__ == "__main__":
    main()
