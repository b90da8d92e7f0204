"""Models for other runtimes: ONNX, ``torch.export``, safetensors; fused, and compared with torch."""
from ewa3d.export.checkpoint import DTYPES, ExportReport, export_checkpoint
from ewa3d.export.programs import FORMATS, read_metadata

__all__ = ['DTYPES', 'FORMATS', 'ExportReport', 'export_checkpoint', 'read_metadata']
