"""What a sceptic asks first: on which machine, how it was timed, with what, and what could not be read."""

from __future__ import annotations

from bench.measure.rounds import STABLE_WITHIN
from bench.measure.stats import MIN_FOR_INTERVAL
from bench.report.elements.formatting import seconds, size
from bench.results import Results


def machine_name(results: Results) -> str:
    """The device the figures were taken on, in words."""
    if results.gpu["identity"]["name"]:
        return str(results.gpu["identity"]["name"])
    cpu = results.environment["cpu"]
    return f"a CPU ({cpu['model']}, {cpu['cores_usable']} cores)"


def rounds_text(results: Results) -> str:
    """How the contestants took turns."""
    if results.in_turns is None:
        return "in interleaved rounds"
    return (
        f"one after the other ({results.in_turns}), so that speed-ups are ratios of medians and not of the same rounds"
    )


def run_name(results: Results) -> str:
    """One results file as a heading: its runtimes, its machine, its day."""
    runtimes = dict.fromkeys(record.runtime for record in results.contestants)
    return f"{'; '.join(runtimes)} on {machine_name(results)}, {results.created_utc[:10]}"


def absent_readings(results: Results) -> dict[str, list[str]]:
    """Reason -> what could not be read for that reason."""
    absent: dict[str, list[str]] = {}
    for what, why in {**results.gpu["missing"], **results.environment["cpu"]["missing"]}.items():
        absent.setdefault(why, []).append(what.replace("_", " "))
    if len(absent.get(results.gpu["reason"] or "", [])) > 4:
        absent[results.gpu["reason"]] = ["GPU clocks, temperature, power, throttle reasons, energy and memory"]
    return absent


def environment_facts(results: Results) -> list[tuple[str, str]]:
    env, gpu = results.environment, results.gpu["identity"]
    cpu = env["cpu"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    facts = [
        ("GPU", gpu["name"] or f"none read: {results.gpu['reason']}"),
        ("CPU", f"{cpu['model']}, {cpu['cores_usable']} usable cores, governor {cpu['governor'] or 'unknown'}"),
        ("memory", f"{size(cpu['memory_bytes'])}, at most {size(env['peak_rss_bytes'])} used by the run"),
        ("system", f"{env['system']}, Python {env['python']}"),
        ("packages", packages),
        (
            "threads",
            f"torch {env['torch_threads']}"
            + "".join(f", {key}={value}" for key, value in env["thread_variables"].items()),
        ),
        ("commit", env["commit"] or "not in a repository"),
        ("command", results.command),
        ("when", f"{results.created_utc}, took {seconds(results.seconds)}"),
    ]
    if gpu["name"]:
        told = ("uuid", "driver", "compute_capability", "power_limit_w", "max_sm_clock_mhz", "board_part_number")
        facts.insert(
            1, ("board", ", ".join(f"{key.replace('_', ' ')} {gpu[key]}" for key in told if gpu.get(key) is not None))
        )
    return facts


def other_facts(results: Results, main: Results) -> list[tuple[str, str]]:
    """The environment of one more run, where it is not that of the main one."""
    known = environment_facts(main)
    return [fact for fact in environment_facts(results) if fact not in known]


def _energy_line(all_results: list[Results]) -> str:
    """How energy was measured, by the runs that have a reading."""
    records = [record for results in all_results for record in results.contestants]
    taken_s = [one.energy["seconds"] for one in records if one.energy["j_per_image"] is not None]
    if not taken_s:
        return "Energy: not measured."
    return (
        "Energy: the whole board's own energy counter (not its power sensor) before and after one contestant has drawn "
        f"the main workload again and again, for at least {min(taken_s):.0f} s, by the pictures drawn; what the board "
        "takes while it waits for the host is part of it."
    )


def method_lines(all_results: list[Results]) -> list[str]:
    """The method in full, in the order in which a sceptic would ask."""
    results = all_results[0]
    load = results.cells[0].workload
    clocks = {"cuda": "CUDA events in the device's stream", "cpu": "the monotonic clock"}
    devices = dict.fromkeys(one.environment["device"] for one in all_results)
    unknown = sum(row.unsettled is None for one in all_results for cell in one.cells for row in cell.rows)
    return [
        "Timed: prompt in, uint8 pixels out. Tokenising, the text encoders, every denoising step with scheduler and "
        "guidance, VAE decode, and the conversion to pixels. Not timed: loading, the first picture (both told apart as "
        "cold start), PNG compression, saving.",
        f"Clock: {' or '.join(clocks[device] for device in devices)}, one mark at the end of each stage, all on one "
        "timeline; an independent clock around the whole call gives the total, and a row of which any call's stages "
        "miss it by over 1 % says so.",
        f"Main workload: {results.cells[0].name}; scheduler {load['scheduler']} (the checkpoint's own where it says "
        f"default), seed {load['seed']}; other rows change one thing at a time.",
        f"Order: warm-up until two calls in a row agree within {STABLE_WITHIN:.0%}".replace("%", " %")
        + ", or as many as the run allowed: a row that had not settled by then says so"
        + (f", of {unknown} it is not known" if unknown else "")
        + ". Then rounds A B C, C B A, "
        "B C A, A C B, so that what happens to the machine happens to all. Workloads are visited twice, there and back "
        "again. The garbage collector runs between rounds, never inside a call.",
        "Medians; 95 % intervals between two of the samples themselves, by their binomial count, which holds whatever "
        f"their distribution; none from fewer than {MIN_FOR_INTERVAL}; of several launches, between the launches' "
        "medians. A speed-up is the median of the per-round ratios, "
        "so that what slows a whole round cancels.",
        "Percentiles only where a binomial bound supports them at 99 % confidence. Raw samples are in the JSON.",
        "FLOPs are counted on meta tensors (a multiply-add is two); bytes are each weight once a call plus inputs and "
        "outputs at two bytes. A row faster than its floor is refused.",
        "Clocks, temperature and power are sampled by a thread while the calls run, throttling by the board's counters of "
        "throttled time too, where it has them: a call that was throttled is told as such.",
        _energy_line(all_results),
        "Quality: the same prompt, seed and steps by the same checkpoint in diffusers, fp32, on the same device.",
        "Built and run are different things: an engine counts as run only where a contestant held that very file and "
        "finished a workload.",
    ]
