"""What a report shows and only models can tell, computed once at the end of a run and written as files."""

from distill.analysis.record import analyse

__all__ = ["analyse"]
