"""What is true about a model: latency by stage, quality, size, and the floor no software can get under."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "options": ["RunOptions"],
        "run": ["run_bench"],
        "results": ["Results", "read_results"],
        "workload": ["Workload"],
        "contestants.contestant": ["Contestant"],
        "measure.clock": ["timed_draw"],
        "contestants.pictures": ["Pictures"],
        "compare": ["compare_results"],
        "report.report": ["write_report"],
    },
)
