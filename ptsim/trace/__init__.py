"""The record of a training run: schema, reading, writing, checks."""

from ptsim.trace.io import Trace, TraceWriter, read_records, read_trace, trace_path
from ptsim.trace.schema import SCHEMA_VERSION

__all__ = ["SCHEMA_VERSION", "Trace", "TraceWriter", "read_records", "read_trace", "trace_path"]
