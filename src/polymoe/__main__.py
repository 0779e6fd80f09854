"""`python -m polymoe` is the same as `polymoe`."""

from polymoe.cli.main import main

main()
