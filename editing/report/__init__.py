"""A study as one HTML file: what lies in a directory is read, told in sections, and laid out on a page.

``findings`` reads files, the ``*_section`` files make plain values of one kind of result each, and ``templates``
lay these out.
"""
