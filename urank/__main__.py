from urank.cli import main

main()
