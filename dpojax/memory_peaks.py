"""How much memory a process has taken at most, as devices and the system count it."""

import jax

_GIB = 2**30


def peak_memory() -> float | None:
    """GiB: of the fullest device or, where devices do not tell, of the process.

    None where neither is known. A CPU's arrays are in the process's memory.
    """
    device, host = device_peak(), host_peak()
    peak = host if device is None else device
    return None if peak is None else peak / _GIB


def host_peak() -> int | None:
    """Bytes of memory that the process has had at most, where Linux tells."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            lines = dict(line.split(":", 1) for line in status)
    except OSError:
        return None
    return 1024 * int(lines["VmHWM"].split()[0])


def reset_host_peak() -> None:
    """Begins the peak of `host_peak` anew, where Linux allows it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as references:
            references.write("5")
    except OSError:
        return


def device_peak() -> int | None:
    """The same of the device that has had most; None where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return max(peaks, default=None)
