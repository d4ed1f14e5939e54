"""Methods and controls, compared on the same documents: ``act-harness methods``.

A method finds a head set (an artifact) from a recipe and the split ``search``, chooses on
``verify`` and is judged on documents that it never saw. Each is a file here, or a line in one of a
family, and a line in ``registry``.
"""
