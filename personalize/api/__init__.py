"""What Python and the command share, so that both do the same: a recipe from a folder, and a run with its report.

recipes.py  settings -> recipe, with the preset that suits the base and what the pictures show
showing.py  whether a folder shows a thing or a style
runs.py     a run that is trained while it is iterated over, and a run folder as a value that notebooks show
"""
