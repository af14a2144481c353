"""Loaders move keys and values between compact entries and a cache; one module each.

``missing()`` returns why a loader can't run on this machine, ``unsupported(move)`` why it can't make
this move: lists of reasons, empty if it can. ``run(move)`` makes the move on the current stream.
"""
