"""`python -m xlstm_hybrid COMMAND` and `accelerate launch -m xlstm_hybrid COMMAND`: the command line."""

from xlstm_hybrid.cli import main

if __name__ == "__main__":
    main()
