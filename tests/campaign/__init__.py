"""A campaign of real kills: the buffer's process, sampling processes and a training process on one
run directory, signals at random moments, and a checker that believes nobody.

    history     what a process writes down of its own doings, and reads back
    draws       the toy policy and verifier, functions of names alone
    sampler     an actor without an engine: leases, reports tokens, submits
    trainer     a learner without a model: takes, fetches, publishes, checkpoints, commits
    killer      SIGKILL, SIGSTOP, successors while the predecessor sleeps
    checker     the verdict, from the histories and the final ledger alone
    run         the command: `python -m tests.campaign.run --kills 1000 --groups 100000`
"""
