"""`python -m polymoe` is the same as `polymoe`."""

from polymoe.cli import main

main()
