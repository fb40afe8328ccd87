"""What a job tells TensorBoard, MLflow and Weights & Biases: the section `tracking` of its configuration.

The coordinator alone logs, from the events that it writes anyway. Each tracker has a thread and a bounded queue of its
own: one that is slow, full or away costs measurements and never the job.
"""
