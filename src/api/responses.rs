//! The errors that operations answer, declared once for the OpenAPI document.

use std::collections::BTreeMap;

use utoipa::{
    IntoResponses,
    openapi::{Content, Ref, RefOr, Response, ResponseBuilder},
};

macro_rules! problem_responses {
    ($(#[$doc:meta])* $name:ident { $($status:literal => $description:literal,)+ }) => {
        $(#[$doc])*
        pub struct $name;

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                BTreeMap::from([$(($status.to_owned(), problem($description))),+])
            }
        }
    };
}

problem_responses! {
    /// What every operation that needs a key may answer.
    CallerErrors {
        "401" => "No API key, or one that is not known",
        "403" => "The API key lacks the scope",
        "500" => "Something failed on the server's side",
        "503" => "The database or the store does not answer, or the server is stopping",
    }
}

problem_responses! {
    QueryErrors {
        "400" => "The query string or a header is not understood",
    }
}

problem_responses! {
    BodyErrors {
        "400" => "The body is not JSON",
        "413" => "The body is too large",
        "415" => "The Content-Type is not taken",
        "422" => "The body has mistakes: `errors` lists each with a JSON pointer",
    }
}

problem_responses! {
    ContentErrors {
        "400" => "The body broke off",
        "413" => "The content is too large",
        "415" => "The Content-Type is not taken",
        "422" => "The content is not UTF-8, a line is not a document, or it is empty",
    }
}

problem_responses! {
    ImportErrors {
        "400" => "The body is not multipart/form-data, or broke off",
        "413" => "The checkpoint is too large",
        "415" => "The Content-Type is not taken",
        "422" => "The checkpoint cannot be continued from: `errors` says why, with the file's name first in each pointer",
    }
}

problem_responses! {
    NotFoundError {
        "404" => "There is no such object in the key's project",
    }
}

problem_responses! {
    ConflictError {
        "409" => "The object's state, or something that uses it, does not allow this",
    }
}

problem_responses! {
    GoneError {
        "410" => "It was deleted",
    }
}

problem_responses! {
    RangeError {
        "416" => "The range lies outside of the file",
    }
}

fn problem(description: &str) -> RefOr<Response> {
    let schema = Ref::from_schema_name("ProblemDetails");
    ResponseBuilder::new()
        .description(description)
        .content("application/problem+json", Content::new(Some(schema)))
        .build()
        .into()
}
