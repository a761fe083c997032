"""What bench_buffer.py measures with.

wire       one HTTPS connection with keep-alive, by hand, so that the client costs little
plain      the same server without a buffer behind it: what HTTPS alone takes
load       processes that upload groups and send heartbeats, and note how long each call took
scene      a run directory, its buffer process, and a trainer that takes and commits
"""
