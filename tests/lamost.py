"""Spectra as LAMOST writes them."""

import io

import numpy as np
from astropy.io import fits

HEADER = {
    "TELESCOP": "LAMOST", "OBSID": 19013116, "LMJD": 55917, "MJD": 55916, "PLANID": "B5591705", "SPID": 13,
    "FIBERID": 116, "RA": 184.850304, "DEC": 28.382399, "VACUUM": True, "CLASS": "STAR", "SUBCLASS": "M3",
    "Z": -1.5e-4,
}  # fmt: skip


def lamost_file(wavelength: np.ndarray, flux: np.ndarray, ivar: np.ndarray, *, table: bool = False, **cards) -> bytes:
    """A file as until DR7 or, with `table`, as since DR8, with these cards in its header beside the usual ones.

    wavelength (Å, vacuum), flux and ivar: (n,).
    """
    arrays = {"FLUX": flux, "IVAR": ivar, "WAVELENGTH": wavelength, "ANDMASK": 0 * flux, "ORMASK": 0 * flux}
    if table:
        columns = [fits.Column(name, f"{len(flux)}E", array=array[None]) for name, array in arrays.items()]
        hdus = [fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name="COADD")]
    else:
        hdus = [fits.PrimaryHDU(np.stack(list(arrays.values())).astype(np.float32))]
        hdus[0].header.update(COEFF0=np.log10(wavelength[0]), COEFF1=1e-4)
    hdus[0].header.update(HEADER | cards)
    content = io.BytesIO()
    fits.HDUList(hdus).writeto(content)
    return content.getvalue()
