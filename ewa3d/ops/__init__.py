"""Operators on points and boxes, in torch alone; each has a naive twin in the tests."""
from ewa3d.ops.ball import ball_query
from ewa3d.ops.boxes import box3d_corners, box3d_giou, box3d_iou, nms3d, official_giou, points_in_boxes
from ewa3d.ops.chamfer import chamfer_distance, nearest_squared
from ewa3d.ops.interpolate import interpolate
from ewa3d.ops.points import check_points, gather, knn, neighbours
from ewa3d.ops.pooling import patch_max
from ewa3d.ops.sampling import fps

__all__ = ['fps', 'knn', 'neighbours', 'ball_query', 'gather', 'check_points', 'patch_max', 'chamfer_distance',
           'nearest_squared', 'interpolate', 'box3d_corners', 'box3d_giou', 'box3d_iou', 'nms3d', 'official_giou',
           'points_in_boxes']
