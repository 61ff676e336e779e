"""Parts of frames: values by stream, their sender, and the frame that they become, in the gateway and in a reader."""
