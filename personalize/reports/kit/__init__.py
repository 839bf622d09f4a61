"""What all reports are made of, torch-free.

page.py       one self-contained HTML page from a jinja template, within a budget of bytes
macros.html.j2  parts of pages: a picture, a piece of code, a chart
pictures.py   pictures as data URLs
curves.py     curves as SVG paths
tables.py     columns of text
"""
