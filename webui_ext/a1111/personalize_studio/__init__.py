"""What the plugins of all image UIs share: the studio's environment, its service, and a way for the browser to reach it.

Standard library alone, Python 3.10 syntax, nothing of any host. Each plugin has the same files: `make plugins` copies those of
`webui_ext/a1111` to the others, and a test holds them against each other.

settings.py     where things are, as one value          environment.py  a private environment, made by a process of its own
service.py      the service: found, or started          lease.py        who needs it, as locked files that die with their holders
keep.py         the service's process, which ends when nobody holds a lease any more
proxy.py        who may come in; requests passed on, as streams
bridge.py       all of it as one function from request to answer, which a host calls for everything below its prefix
panel.html, panel.js, panel.css, theme.js   what is shown until the studio is there
"""

from .bridge import Bridge
from .proxy import Answer, Refusal
from .settings import Settings

__all__ = ["Answer", "Bridge", "Refusal", "Settings"]
