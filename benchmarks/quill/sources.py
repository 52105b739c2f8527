"""The packages whose documentation the model is trained on: exact versions and licences, nothing copyleft."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One package at one version; ``pages`` says that its source archive is read for documentation pages too."""

    name: str
    version: str
    licence: str
    pages: bool = False


_BSD, _MIT, _APACHE = "BSD-3-Clause", "MIT", "Apache-2.0"

SOURCES: tuple[Source, ...] = (
    Source("aiohttp", "3.14.5", "Apache-2.0 AND MIT", pages=True),
    Source("anyio", "4.16.0", _MIT),
    Source("astropy", "8.0.2", _BSD),
    Source("attrs", "26.1.0", _MIT, pages=True),
    Source("black", "26.10.1", _MIT),
    Source("bokeh", "3.9.2", _BSD),
    Source("click", "8.5.1", _BSD, pages=True),
    Source("dask", "2026.8.0", _BSD, pages=True),
    Source("django", "5.2.19", _BSD, pages=True),
    Source("djangorestframework", "3.18.3", _BSD),
    Source("fastapi", "0.165.0", _MIT),
    Source("flask", "3.1.3", _BSD, pages=True),
    Source("flax", "0.12.8", _APACHE),
    Source("geopandas", "1.2.0", _BSD),
    Source("h5py", "3.16.0", _BSD),
    Source("httpx", "0.28.1", _BSD),
    Source("ipython", "9.18.1", _BSD, pages=True),
    Source("jax", "0.10.2", _APACHE),
    Source("jinja2", "3.1.6", _BSD, pages=True),
    Source("keras", "3.15.1", _APACHE),
    Source("matplotlib", "3.11.2", "Matplotlib (PSF-2.0 style)"),
    Source("mkdocs", "1.6.1", "BSD-2-Clause"),
    Source("mypy", "2.4.1", _MIT),
    Source("networkx", "3.6.1", _BSD, pages=True),
    Source("nltk", "3.10.4", _APACHE),
    Source("numba", "0.68.1", "BSD-2-Clause"),
    Source("numpy", "2.4.6", _BSD),
    Source("optax", "0.2.8", _APACHE),
    Source("pandas", "3.1.1", _BSD),
    Source("pip", "26.3", _MIT, pages=True),
    Source("polars", "2.1.0", _MIT),
    Source("pydantic", "2.14.3", _MIT),
    Source("pygments", "2.21.0", "BSD-2-Clause"),
    Source("pymc", "5.28.5", _APACHE),
    Source("pytest", "9.2.0", _MIT, pages=True),
    Source("requests", "2.34.2", _APACHE),
    Source("rich", "15.0.0", _MIT),
    Source("scikit-image", "0.26.0", _BSD),
    Source("scikit-learn", "1.9.1", _BSD),
    Source("scipy", "1.17.1", _BSD),
    Source("scrapy", "2.19.0", _BSD, pages=True),
    Source("seaborn", "0.13.2", _BSD, pages=True),
    Source("setuptools", "84.2.1", _MIT, pages=True),
    Source("sphinx", "9.0.4", "BSD-2-Clause", pages=True),
    Source("sqlalchemy", "2.1.9", _MIT),
    Source("starlette", "1.10.0", _BSD),
    Source("statsmodels", "0.15.0", _BSD),
    Source("sympy", "1.14.0", _BSD),
    Source("tornado", "6.6.1", _APACHE, pages=True),
    Source("trio", "0.35.0", "MIT OR Apache-2.0"),
    Source("twisted", "26.10.0", _MIT, pages=True),
    Source("werkzeug", "3.1.9", _BSD, pages=True),
    Source("xarray", "2026.9.0", _APACHE, pages=True),
)

LIBRARY_LICENCE = "PSF-2.0"
"""Licence of the interpreter's own standard library, which is read where it is installed."""

QUOTABLE = frozenset({"python", "scipy", "networkx", "pandas", "django", "sympy"})
"""Packages that ``heldout.txt`` may quote: PSF and three-clause BSD only, so one notice file covers them."""
