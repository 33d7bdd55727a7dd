"""A study as one HTML file: what lies in a directory is read, told in sections, and laid out on a page.

``findings`` reads files, the ``*_section`` files tell one kind of result each, and ``markup``, ``tables``,
``matrix``, ``samples``, ``curves`` and ``page`` turn words and numbers into HTML.
"""
