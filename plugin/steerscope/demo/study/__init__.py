"""How its features are found and judged: dictionary, circuit, read-outs, concepts, evidence."""
