"""A real Slurm of several nodes on one Linux machine: `make slurm-up`, `make slurm-down`.

`python3 -m slurm.mini --help` lists what can be done to it. Needs Python's standard library alone.

Form `user`: an ordinary user, several slurmd on one host, each with ports of its own.
Form `root`: a node is a set of namespaces with its own address, host name, processes and /dev/shm,
so it can lose power or its network; slurmdbd with MariaDB, so `sacct` works.
"""
