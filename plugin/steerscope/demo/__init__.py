"""The embedded world: a tiny model that knows some names, declines others, and the features that show it.

`world` holds the facts and the splits, `names` prints questions from them, `scoring` judges whole answers,
and `python -m steerscope.demo.train` makes the model and its catalog again from nothing.
"""
