"""The user's own log: raw events and a catalogue, converted to the contract's tables (`prepare.source.kind: log`)."""
