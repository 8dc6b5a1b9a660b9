"""The embedded world: a tiny model that knows some names and declines others, with its features.

    world/     who exists, what is asked, how whole answers are scored
    making/    the model: tokenizer, training stream, training
    study/     its features: dictionary, circuit, read-outs, catalog, evidence
    live/      the model behind a real server: story, evaluation
    artifacts/ what came of it, committed

``python -m steerscope.demo.train`` makes model and catalog again from nothing.
"""
