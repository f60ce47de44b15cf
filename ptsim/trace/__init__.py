"""The record of a training run: schema, reading, writing, checks."""

from ptsim.trace.io import TraceWriter, read_records, read_trace, trace_path
from ptsim.trace.schema import SCHEMA_VERSION
from ptsim.trace.trace import Trace

__all__ = ["SCHEMA_VERSION", "Trace", "TraceWriter", "read_records", "read_trace", "trace_path"]
