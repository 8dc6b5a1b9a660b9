"""The embedded world: a tiny model that knows some names and declines others, with its features.

`world` asks questions, `names` prints them, `scoring` judges whole answers, and
`python -m steerscope.demo.train` makes the model and its catalog again from nothing.
"""
