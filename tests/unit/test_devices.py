"""What the machine says of its processor and of the cores that may be used."""

import os

import pytest

from synthgen import devices
from synthgen.loader import workers_for


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "name", "is_intel"),
    [
        ("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\n", "x86_64", "Intel(R) Xeon(R)", True),
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "x86_64", "AMD EPYC", False),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64", "aarch64", False),
        ("", "Intel64 Family 6 Model 154, GenuineIntel", "Intel64 Family 6 Model 154, GenuineIntel", True),
        ("", "AMD64 Family 25 Model 33, AuthenticAMD", "AMD64 Family 25 Model 33, AuthenticAMD", False),
    ],
)
def test_name_and_maker_of_the_processor(monkeypatch, cpuinfo, processor, name, is_intel):
    monkeypatch.setattr(devices, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(devices.platform, "processor", lambda: processor)
    assert (devices.cpu_name(), devices.has_intel_cpu()) == (name, is_intel)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 16),
        ({"cpu.max": "nonsense"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_the_quota_of_a_container_bounds_the_cores(monkeypatch, tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert devices.num_cores() == cores
    assert workers_for(-1) == (0 if cores <= 2 else min(8, cores - 1))
