"""`python -m xlstm_hybrid VERB` and `accelerate launch -m xlstm_hybrid VERB`: the command line."""

from xlstm_hybrid.cli import main

if __name__ == "__main__":
    main()
