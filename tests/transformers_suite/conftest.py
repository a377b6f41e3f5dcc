"""
transformers' own common test suites, applied to AUSM.

They come with the source distribution of transformers, not with its wheel. `fetch.py` beside this file puts those of
the installed version into the environment; without them these tests are skipped.
"""

import importlib.util
import sys
import types
from pathlib import Path

FOLDER = Path(sys.prefix) / "transformers-tests"


def _package(name: str, folder: Path | None = None) -> types.ModuleType:
    spec = importlib.util.spec_from_loader(name, None, is_package=True)
    spec.submodule_search_locations = [] if folder is None else [str(folder)]
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    return module


def _stand_in(name: str, **names):
    """For modules that the suites import and that no distribution has: what is tested there is text generation, ..."""
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        _package(parent)
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(names)


if FOLDER.is_dir():
    _package("transformers_tests", FOLDER)
    _stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=object)
    _stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
    # The settings of every configuration, at values that differ from their defaults.
    _stand_in(
        "transformers_tests.utils.test_configuration_utils",
        config_common_kwargs={
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["AusmModel"],
            "problem_type": "regression",
        },
    )


def pytest_configure(config):
    """Marks that the suites put on their tests."""
    marks = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test"
    for mark in marks.split():
        config.addinivalue_line("markers", f"{mark}: of transformers")
