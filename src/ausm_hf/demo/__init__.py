"""The demo: a web page that shows what the model does. The command `ausm demo` and the Space run the same code.

This package is imported by the process that decodes uploads, too, so it imports nothing here.
"""
