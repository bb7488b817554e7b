//! The learning switch: forwarding decision, pipeline, workers, counters.
