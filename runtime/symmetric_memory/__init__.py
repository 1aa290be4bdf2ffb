"""Symmetric memory: data that every rank of a group can read where it lies, and all-reduces of it.

policy says which groups use it, groups knows the groups of this process, rendezvous makes their
memory, collective_ops is what compiled code calls. On CPU the memory is shared memory of the host.
"""
