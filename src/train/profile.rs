//! Where the time of an update goes: spans by name, written as a trace that Perfetto opens (the trace event format).

use std::{
    cell::{Cell, RefCell},
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    time::Instant,
};

use serde::Serialize;
use tch::{Cuda, Device};

use super::error::TrainError;

/// Updates of a phase that pass before spans are recorded: buffers are taken and kernels chosen in the first ones.
const WARMUP_UPDATES: i64 = 2;
/// Updates of a phase that are recorded.
const PROFILED_UPDATES: i64 = 8;

/// A recorder that all parts of a run share. Off, it costs a comparison.
#[derive(Clone, Default)]
pub struct Profile(Option<Rc<Recorder>>);

struct Recorder {
    path: PathBuf,
    started: Instant,
    device: Device,
    /// Of this phase.
    num_updates: Cell<i64>,
    events: RefCell<Vec<TraceEvent>>,
}

#[derive(Serialize)]
struct TraceEvent {
    name: &'static str,
    /// The phase of the update, such as `forward`.
    cat: &'static str,
    /// `X`: with a beginning and a duration.
    ph: &'static str,
    ts: f64,
    dur: f64,
    pid: i32,
    tid: i32,
}

/// From where it is made to where it is dropped.
pub struct Span {
    recorder: Option<Rc<Recorder>>,
    name: &'static str,
    phase: &'static str,
    start_us: f64,
}

impl Profile {
    pub fn to_file(path: &Path, device: Device) -> Self {
        Self(Some(Rc::new(Recorder {
            path: path.to_owned(),
            started: Instant::now(),
            device,
            num_updates: Cell::new(0),
            events: RefCell::new(Vec::new()),
        })))
    }

    /// Whether there is a file that it will be written to.
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Begins a span of this name in a phase of the update.
    pub fn span(&self, phase: &'static str, name: &'static str) -> Span {
        let recorder = self.0.as_ref().filter(|recorder| recorder.is_recording()).cloned();
        let start_us = recorder.as_ref().map_or(0.0, |recorder| recorder.now_us());
        Span { recorder, name, phase, start_us }
    }

    /// The updates that follow are of another kind: so many of them are recorded again.
    pub fn begin_phase(&self) {
        self.0.iter().for_each(|recorder| recorder.num_updates.set(0));
    }

    /// Counts an update, and writes the file after the last one of a phase that is recorded.
    pub fn end_update(&self) -> Result<(), TrainError> {
        let Some(recorder) = &self.0 else { return Ok(()) };
        recorder.num_updates.set(recorder.num_updates.get() + 1);
        match recorder.num_updates.get() == WARMUP_UPDATES + PROFILED_UPDATES {
            true => recorder.write(),
            false => Ok(()),
        }
    }

    /// Writes what there is, at the end of a run whose last phase had fewer updates.
    pub fn finish(&self) -> Result<(), TrainError> {
        match &self.0 {
            Some(recorder) if recorder.num_updates.get() < WARMUP_UPDATES + PROFILED_UPDATES => recorder.write(),
            _ => Ok(()),
        }
    }
}

impl Recorder {
    fn is_recording(&self) -> bool {
        (WARMUP_UPDATES..WARMUP_UPDATES + PROFILED_UPDATES).contains(&self.num_updates.get())
    }

    /// Work that was given to a GPU counts where it was given.
    fn now_us(&self) -> f64 {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(index as i64);
        }
        self.started.elapsed().as_secs_f64() * 1e6
    }

    fn write(&self) -> Result<(), TrainError> {
        let trace = serde_json::json!({"displayTimeUnit": "ms", "traceEvents": &*self.events.borrow()});
        fs::write(&self.path, trace.to_string()).map_err(|error| TrainError::storage("write", &self.path, error))?;
        tracing::info!(profile.path = %self.path.display(), "profile written; ui.perfetto.dev opens it");
        Ok(())
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(recorder) = &self.recorder else { return };
        let Self { name, phase: cat, start_us: ts, .. } = *self;
        let dur = recorder.now_us() - ts;
        recorder.events.borrow_mut().push(TraceEvent { name, cat, ph: "X", ts, dur, pid: 1, tid: 1 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_has_the_updates_after_the_first_ones_of_each_phase() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        let profile = Profile::to_file(&path, Device::Cpu);
        for phase in ["full rank", "low rank"] {
            profile.begin_phase();
            for _ in 0..WARMUP_UPDATES + PROFILED_UPDATES + 3 {
                let update = profile.span("update", phase);
                drop(profile.span("forward", "attention"));
                drop(update);
                profile.end_update().unwrap();
            }
        }
        profile.finish().unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len() as i64, 2 * 2 * PROFILED_UPDATES);
        let (inner, outer, last) = (&events[0], &events[1], &events[events.len() - 1]);
        assert_eq!((outer["name"].as_str(), last["name"].as_str()), (Some("full rank"), Some("low rank")));
        assert_eq!((inner["name"].as_str(), outer["cat"].as_str()), (Some("attention"), Some("update")));
        assert!(inner["ts"].as_f64() >= outer["ts"].as_f64() && inner["dur"].as_f64() <= outer["dur"].as_f64());
    }

    #[test]
    fn without_a_file_nothing_is_recorded() {
        let profile = Profile::default();
        drop(profile.span("forward", "attention"));
        profile.end_update().unwrap();
        profile.finish().unwrap();
    }
}
