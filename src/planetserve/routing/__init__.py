"""Which chain of servers carries a request, and which blocks a joining server takes.

Pure decisions over immutable snapshots: standard library and numpy, no I/O, no clock.
"""
