"""Report: the results in a directory as one HTML page, and the tables and figures of evaluations.

``findings`` reads the files, each ``*_section`` prepares the values of one kind of result, and ``templates`` lay them
out.
"""
