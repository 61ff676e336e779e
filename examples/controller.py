"""The other side: a controller that pulls a run's packets from a gateway and decides. Ends when the run has ended."""

import argparse

import esper_otel

parser = argparse.ArgumentParser()
parser.add_argument("run_id")
parser.add_argument("--target", default="127.0.0.1:4327")
options = parser.parse_args()

with esper_otel.TamiyoClient(options.target) as client:
    cursor = None
    while True:
        page = client.pull(options.run_id, cursor, wait_s=1)
        if page.gap:
            print(f"{page.gap} steps are lost to us")
        for packets in page:
            alarms = [event.description for packet in packets.telemetry for event in packet.events]
            print(f"step {packets.step}: loss {packets.state.training_loss:.3f}", *alarms)
        cursor = page.cursor
        if not page and (outcome := client.ended(options.run_id)):
            print(f"the run has ended: {outcome}")
            break
