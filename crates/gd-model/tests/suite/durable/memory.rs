//! A file system in memory that simulates power failures and failing operations.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Write};
use std::path::Path;
use std::rc::Rc;

use gd_model::io::checkpoint::{Disk, Output};

/// A file or a folder: its current content, and the synced content that would be there after a power failure.
#[derive(Clone)]
enum Node {
    File { live: Vec<u8>, durable: Vec<u8> },
    Folder { live: BTreeMap<String, usize>, durable: BTreeMap<String, usize> },
}

/// Which unsynced changes are lost at a restart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Loss {
    /// None, because only the program crashed.
    Nothing,
    /// All.
    Everything,
    /// The contents of files, but not the entries of folders.
    Contents,
}

/// Which operations fail, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// The index of the first operation that fails.
    pub first: usize,
    /// Whether all following operations fail, too.
    pub lasting: bool,
    /// The error number of the system.
    pub errno: i32,
}

#[derive(Default)]
struct Inner {
    nodes: RefCell<Vec<Node>>,
    operations: Cell<usize>,
    fault: Cell<Option<Fault>>,
    failed: Cell<bool>,
}

/// Clones are the same file system.
#[derive(Clone, Default)]
pub(super) struct Memory(Rc<Inner>);

impl Memory {
    /// A file system with only the folder `/`.
    pub(super) fn new() -> Self {
        let memory = Self::default();
        memory.add(Node::Folder { live: BTreeMap::new(), durable: BTreeMap::new() });
        memory
    }

    /// Restarts the count of operations and sets which of them fail.
    pub(super) fn inject(&self, fault: Option<Fault>) {
        self.0.operations.set(0);
        self.0.failed.set(false);
        self.0.fault.set(fault);
    }

    /// Whether an operation has failed.
    pub(super) fn failed(&self) -> bool {
        self.0.failed.get()
    }

    /// Simulates a crash and a restart.
    pub(super) fn restart(&self, loss: Loss) {
        self.inject(None);
        for node in self.0.nodes.borrow_mut().iter_mut() {
            match node {
                Node::File { live, durable } => match loss {
                    Loss::Nothing => durable.clone_from(live),
                    Loss::Everything | Loss::Contents => live.clone_from(durable),
                },
                Node::Folder { live, durable } => match loss {
                    Loss::Everything => live.clone_from(durable),
                    Loss::Nothing | Loss::Contents => durable.clone_from(live),
                },
            }
        }
    }

    /// Changes the content of a file without counting an operation.
    pub(super) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let id = self.find(path).unwrap();
        match &mut self.0.nodes.borrow_mut()[id] {
            Node::File { live, .. } => change(live),
            Node::Folder { .. } => panic!("{}", path.display()),
        }
    }

    fn step(&self) -> io::Result<()> {
        let n = self.0.operations.replace(self.0.operations.get() + 1);
        match self.0.fault.get() {
            Some(f) if n == f.first || (f.lasting && n > f.first) => {
                self.0.failed.set(true);
                Err(io::Error::from_raw_os_error(f.errno))
            }
            _ => Ok(()),
        }
    }

    fn add(&self, node: Node) -> usize {
        let mut nodes = self.0.nodes.borrow_mut();
        nodes.push(node);
        nodes.len() - 1
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut id = 0;
        for name in path.strip_prefix("/").unwrap() {
            id = match &self.0.nodes.borrow()[id] {
                Node::Folder { live, .. } => {
                    *live.get(name.to_str().unwrap()).ok_or(io::ErrorKind::NotFound)?
                }
                Node::File { .. } => return Err(io::ErrorKind::NotADirectory.into()),
            };
        }
        Ok(id)
    }

    /// Changes the entries of the folder of `path`.
    fn names<T>(
        &self,
        path: &Path,
        f: impl FnOnce(&mut BTreeMap<String, usize>, String) -> T,
    ) -> io::Result<T> {
        let folder = self.find(path.parent().unwrap())?;
        match &mut self.0.nodes.borrow_mut()[folder] {
            Node::Folder { live, .. } => Ok(f(live, path.file_name().unwrap().to_str().unwrap().into())),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }
}

impl Disk for Memory {
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.step()?;
        let id = self.add(Node::File { live: Vec::new(), durable: Vec::new() });
        self.names(path, |names, name| names.insert(name, id))?;
        Ok(Box::new(Opened { memory: self.clone(), id }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        let id = self.add(Node::Folder { live: BTreeMap::new(), durable: BTreeMap::new() });
        self.names(path, |names, name| match names.contains_key(&name) {
            true => Err(io::ErrorKind::AlreadyExists.into()),
            false => {
                names.insert(name, id);
                Ok(())
            }
        })?
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        let id = self.find(path)?;
        match &mut self.0.nodes.borrow_mut()[id] {
            Node::Folder { live, durable } => durable.clone_from(live),
            Node::File { .. } => return Err(io::ErrorKind::NotADirectory.into()),
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        let id = self.find(from)?;
        if let Ok(old) = self.find(to)
            && matches!(&self.0.nodes.borrow()[old], Node::Folder { live, .. } if !live.is_empty())
        {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.names(from, |names, name| names.remove(&name))?;
        self.names(to, |names, name| names.insert(name, id))?;
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.find(path)?;
        self.names(path, |names, name| names.remove(&name)).map(drop)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        self.step()?;
        let id = self.find(path)?;
        match &self.0.nodes.borrow()[id] {
            Node::File { live, .. } => Ok(Box::new(Cursor::new(live.clone()))),
            Node::Folder { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.step()?;
        let id = self.find(path)?;
        match &self.0.nodes.borrow()[id] {
            Node::Folder { live, .. } => Ok(live.keys().cloned().collect()),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }
}

struct Opened {
    memory: Memory,
    id: usize,
}

impl Write for Opened {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.memory.step()?;
        // A write may write less than the whole buffer.
        let n = bytes.len().min(4096);
        if let Node::File { live, .. } = &mut self.memory.0.nodes.borrow_mut()[self.id] {
            live.extend_from_slice(&bytes[..n]);
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for Opened {
    fn sync(&mut self) -> io::Result<()> {
        self.memory.step()?;
        if let Node::File { live, durable } = &mut self.memory.0.nodes.borrow_mut()[self.id] {
            durable.clone_from(live);
        }
        Ok(())
    }
}
