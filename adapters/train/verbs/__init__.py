"""`loraplex train VERB`: a module for each verb, with its flags (`add_arguments`) and what it does (`execute`).

A verb raises an AdapterError where something is wrong; cli.py turns it into a message and an exit code. torch is loaded
only by a verb that needs it, and only when its configuration has been read without an error.
"""
