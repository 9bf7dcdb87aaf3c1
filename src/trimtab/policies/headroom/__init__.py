"""Headroom: what an edit could gain on a task, before any policy is trained.

Every feature is tried on every item where answers are one token; some are held over the whole answer where they are
longer. The table of rewards, items × features, gives the lines that a policy stands between.
"""
