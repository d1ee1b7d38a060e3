"""Attribution methods and wrappers, all of them Captum `Attribution` classes."""

from typing import TYPE_CHECKING, Any

from captum_ext._deprecation import old_name
from captum_ext.attr import layer, wrappers
from captum_ext.attr.fido import FIDO as FIDO
from captum_ext.attr.fido import FIDOMasks as FIDOMasks
from captum_ext.attr.layer import *  # noqa: F403
from captum_ext.attr.rise import RISE as RISE
from captum_ext.attr.rise import RISEMaps as RISEMaps
from captum_ext.attr.wrappers import *  # noqa: F403

if TYPE_CHECKING:
    from captum_ext.fcam.attribution import FCAM as FCAM

if not TYPE_CHECKING:  # a type checker reads the imports; for it, unknown names stay errors
    __all__ = sorted(
        [*layer.__all__, *wrappers.__all__, "FCAM", "FIDO", "FIDOMasks", "RISE", "RISEMaps"]
    )

    def __getattr__(name: str) -> Any:
        """Import FCAM on request, since its module needs this one; and the old names."""
        if name == "FCAM":
            from captum_ext.fcam.attribution import FCAM

            return FCAM
        return old_name(__name__, layer.OLD_NAMES, name)
