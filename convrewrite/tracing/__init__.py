"""The parts of capture: the graph of a piece of the model, copies without values, the tracer, the run for shapes."""
