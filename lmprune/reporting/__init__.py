"""From a sweep's folder to what people look at.

``collect``   the folder's files, checked against one another     pure
``words``     tables and plain sentences                          pure
``figures``   pictures, by matplotlib
``page``      one HTML file, by Jinja; and report.md with PNGs
"""
