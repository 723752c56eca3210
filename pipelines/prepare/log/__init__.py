"""A log of one's own, from raw events and a catalogue to the contract's tables (`prepare.source.kind: log`)."""
